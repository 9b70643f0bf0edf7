"""Programs to launch and to edit."""
