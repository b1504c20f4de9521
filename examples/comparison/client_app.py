"""A client of the comparison: answers what any of the methods asks."""

from fedzge_flwr.compare.app import client_app

app = client_app()
