"""``python -m fedzge_flwr.cli`` is ``fedzge``."""

from fedzge_flwr.cli.app import main

if __name__ == "__main__":
    main()
