"""``python -m llmapi`` is the command ``llmapi``."""

import sys

from llmapi.cli import main

if __name__ == "__main__":
    sys.exit(main())
