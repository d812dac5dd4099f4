"""A run's flow on another System, of molecules whose distributions are known."""

import json
from dataclasses import replace

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.cli.main import main
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.retarget import RETARGET, retarget, retarget_settings
from openmm_tsf.workflow.settings import SamplingSettings
from tests.support.exact_cases import the_tree, tree_flow
from tests.support.exact_tree import POSITIONS, ExactTree
from tests.support.mutants import replaced  # noqa: F401
