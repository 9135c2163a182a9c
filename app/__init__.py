"""The service: HTTP and images in, predictions out."""
