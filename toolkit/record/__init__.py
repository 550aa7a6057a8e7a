"""What came out? Files first; everything here is written whole and read by others."""
