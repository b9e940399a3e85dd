"""HTTP in and out. Nothing here touches a tensor."""
