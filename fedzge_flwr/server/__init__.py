"""The server's side of a round, without transport: no flwr, no data loading."""
