"""From records to intervals and a verdict."""
