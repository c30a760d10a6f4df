"""``python -m kvruntime``."""

from kvruntime.cli import main

main()
