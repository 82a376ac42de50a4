"""What each function would run, here and on accelerators elsewhere, and its memory."""
