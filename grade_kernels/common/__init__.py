"""What both backends and the public operations use; it knows neither backend."""
