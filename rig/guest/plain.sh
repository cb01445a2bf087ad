# One controller, two block sizes: the suite once over each.
step "suite, 512 B blocks" nvme-suite nvme://$(slot 8)/1
step "suite, 4096 B blocks" nvme-suite nvme://$(slot 8)/2
