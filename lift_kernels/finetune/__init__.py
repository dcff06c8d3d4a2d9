"""Fine-tune a language model on question/answer problems and report result and cost.

The package needs the extra ``finetune`` (transformers and others). Only `lift_kernels.cli` imports
it.
"""

from ..errors import UserError
from .config import Settings
from .run import run
from .run_dir import settings_of

__all__ = ["Settings", "UserError", "run", "settings_of"]
