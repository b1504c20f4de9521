"""The server of the comparison: runs the method that ``strategy`` names."""

from fedzge_flwr.compare.app import server_app

app = server_app()
