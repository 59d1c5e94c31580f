"""Merge: base and adapter -> the model a user deploys, streamed and checked."""
