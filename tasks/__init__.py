"""The programs: stages, which dvc.yaml runs as `python -m tasks.stages.<stage>`, and the command `dgpo`.

A stage reads its section of params.yaml and its inputs, calls `dgpo_core`, writes its outputs and reports
to MLflow. Nothing here knows Prefect.
"""

import gc
import os
import sys

from dgpo_core.installed import require_installed
from tasks.project.process import die_with_parent

require_installed()

# Before torch is imported: two OpenMP threads that spin at barriers are up to 50 times slower beside any
# other busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Imports make some hundred thousand objects that stay; with Python's own 700 a sixth of the time goes into
# looking for garbage among them.
gc.set_threshold(50_000, 20, 50)

# True while `python -m tasks.<module>` imports this package. Asking here and not in the stage's `main` closes
# the seconds in which the slow imports run and a killed `dvc` would leave the stage behind.
if sys.argv[0] == "-m":
    die_with_parent()
