"""The one owner of the wire: typed messages to and from Flower's RecordDict, and their bytes."""
