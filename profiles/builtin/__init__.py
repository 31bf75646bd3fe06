"""The profiles that ship with nasdeploy, one device a file."""
