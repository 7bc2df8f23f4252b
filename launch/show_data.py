"""Look at a recipe's data: `python launch/show_data.py [--config RECIPE.yaml] [--section.key VALUE ...]`."""

import sys
from pathlib import Path

from lorasc_ds.show_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default_recipe=Path(__file__).parent / "recipes" / "quickstart.yaml"))
