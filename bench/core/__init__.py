"""The ground under all rooms: files, progress, the run store, the command line's manners."""
