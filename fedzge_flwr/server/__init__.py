"""The server's side of a round, without transport: no Flower, no data loading."""
