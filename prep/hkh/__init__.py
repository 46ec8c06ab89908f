"""The HKH data set (Landsat 7) as tile stores."""
