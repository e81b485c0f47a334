"""What every room needs, without torch: errors, files, configuration, and the numbers of sampling."""
