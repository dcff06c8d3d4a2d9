"""The main job: fine-tune a causal language model on question/answer problems and report what
changed and what it cost.

Needs the extra ``finetune`` (transformers and its friends); nothing else in lift_kernels imports
this package.
"""

from .job import run
from .resume import settings_of
from .settings import Settings, UserError

__all__ = ["Settings", "UserError", "run", "settings_of"]
