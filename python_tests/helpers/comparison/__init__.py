"""A small stand-in for PEFT's comparison on MetaMathQA, with the interface that LIFT's entry uses.

The modules import each other as theirs do. `write` puts them where a checkout has them.
"""

import json
import shutil
from pathlib import Path

FILES = {"tools.py": "utils.py", "data.py": "data.py", "run.py": "run.py"}
FOLDER = Path("method_comparison") / "MetaMathQA"


def write(checkout: Path, **defaults) -> Path:
    """Write the modules and the default training parameters; returns the folder of both."""
    folder = checkout / FOLDER
    (folder / "results").mkdir(parents=True)
    for source, name in FILES.items():
        shutil.copy(Path(__file__).parent / source, folder / name)
    (folder / "default_training_params.json").write_text(json.dumps(defaults))
    return folder
