"""Python runs this at the start of every process that a test starts: no connection beyond this machine."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("network", Path(__file__).parents[1] / "network.py")
assert _spec is not None
assert _spec.loader is not None
_network = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_network)
_network.forbid()
# The workers of pytest are such processes: their conftest then finds this very module, and what it refused.
sys.modules["network"] = _network
