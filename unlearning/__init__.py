"""Unlearning requests and the proof that they were honoured. The room is reserved; nothing stands in it yet."""
