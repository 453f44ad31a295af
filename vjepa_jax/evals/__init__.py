"""Evaluations of frozen features; each is a function of features and a dataset."""
