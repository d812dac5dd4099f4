"""What a bug report needs: versions, platforms, a self-test, the state of a directory."""
