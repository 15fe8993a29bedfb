"""Every kind of recurrent layer; their interface; weight drop."""
