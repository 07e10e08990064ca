class Settings:
    limit = 1
