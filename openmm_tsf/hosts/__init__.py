"""The moves of this package inside the samplers of other packages, of OpenMM and openmmtools."""
