"""The composition root: settings, launch, gateway, client and command line."""
