"""Every kind of recurrent layer, and what they share: weight drop, and the weights of LSTM and GRU."""
