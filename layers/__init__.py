"""QRNN and Mogrifier; weight drop; the passes over time of model.py's GRU (training) and LSTM (short segments)."""
