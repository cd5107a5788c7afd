// Shows the tooltip of the layer under the pointer in a line below the map, at once and in full.
const line = document.createElement("pre");
line.className = "klora-layer";
line.textContent = "Point at the map to see a layer, its ratio and scores.\n\n\n";
element.appendChild(line);
element.addEventListener("mousemove", (event) => {
  const row = event.target.closest(".klora-layers rect");
  if (row) line.textContent = row.querySelector("title").textContent;
  if (!line.isConnected) element.appendChild(line);
});
watch("value", () => element.appendChild(line));
