"""People, wires, money: which candidates may serve a call."""
