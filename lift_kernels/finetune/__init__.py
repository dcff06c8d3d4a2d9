"""The main job: fine-tune a causal language model on question/answer problems and report what
changed and what it cost.

Needs the extra ``finetune`` (transformers and its friends); nothing else in lift_kernels imports
this package.
"""

from ..errors import UserError
from .config import Settings
from .run import run
from .run_dir import settings_of

__all__ = ["Settings", "UserError", "run", "settings_of"]
