# The physical function gives queues and interrupts to its virtual ones by Virtualization
# Management commands (NVMe 2.0, section 5.28) and stays with the kernel's driver.
load nvme
sleep 1
physical=$(functions | head -n 1)
dev=/sys/bus/pci/devices/$physical
admin() { pumice-rig guest admin /dev/nvme0 28 $1 $2; }
virtual_functions() {
	set -e
	echo 0 > $dev/sriov_drivers_autoprobe
	admin $((1 << 8 | 1)) 0   # primary: no flexible interrupts
	admin $((0 << 8 | 1)) 0   # primary: no flexible queues
	echo 1 > /sys/class/nvme/nvme0/reset_controller
	echo 2 > $dev/sriov_numvfs
	for c in 1 2; do
		admin $((c << 16 | 1 << 8 | 8)) 2   # secondary: two interrupts
		admin $((c << 16 | 0 << 8 | 8)) 2   # secondary: two queues
		admin $((c << 16 | 9)) 0            # secondary: online
	done
	load vfio_iommu_type1
	load vfio_pci
	attach $(functions | tail -n 1) vfio-pci
	set +e
}
step "virtual functions come up" virtual_functions
virtual=$(functions | tail -n 1)
step "verify on a virtual function" pumice-rig test verify nvme://$virtual/1
suite "on a virtual function" nvme://$virtual
step "physical function still works" dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=16
