"""With which model? Single-process code that knows nothing of devices, ranks or losses."""
