import json
from pathlib import Path

from .inner.autograd import cube
from .inner.fakes import square

DATA = json.loads(Path(__file__).with_name("data.json").read_text())

__all__ = ["DATA", "cube", "square"]
