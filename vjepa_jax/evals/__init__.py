"""Evaluations of frozen features; each is a function of a model and a config."""
