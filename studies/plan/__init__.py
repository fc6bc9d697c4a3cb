"""From a load and its objectives to a fleet and its price: bounds, the smallest fleet that holds, the answer."""
