"""People, wires, money: which candidates may serve a call."""

__version__ = "0.1.0"
