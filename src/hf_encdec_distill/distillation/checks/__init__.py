"""What a run is refused or warned for, each by itself."""
