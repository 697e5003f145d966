from hypothesis import settings

# the first example of a test may import or compile; time is pytest's affair
settings.register_profile("elastic", deadline=None)
settings.load_profile("elastic")
