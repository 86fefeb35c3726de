"""Where the command `peft-prompt-ext` starts. `import peft_prompt_ext` imports PEFT and torch, which takes seconds.

Help needs neither, so it is answered with the package's __init__ left out.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType


PACKAGE = "peft_prompt_ext"


def main(argv: Sequence[str] | None = None) -> None:
    """Run `peft_prompt_ext.cli.main`.

    Args:
        argv: The command's name and its arguments, else those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if (len(argv) < 2 or {"-h", "--help"} & set(argv)) and PACKAGE not in sys.modules:
        _import_without_init()
    # where PEFT imports it, it recommends a package for 4-bit inference, in every command
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft_prompt_ext import cli

    cli.main(argv)


def _import_without_init() -> None:
    """Put an empty package in place of the real one, in which submodules are found as usual."""
    spec = find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations is not None:
        package = ModuleType(PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = package


if __name__ == "__main__":
    main()
