"""Layers with a file of their own; the weight-dropped LSTM and GRU are in model.py."""
