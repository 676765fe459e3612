"""What has to match between student and teacher before their distributions can be compared: positions and ids."""
