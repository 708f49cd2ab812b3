"""Media: frames, movies, pictures and sheets, as files that people look at."""
