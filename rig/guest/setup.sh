# Tests the operator's tools on controllers of the kernel's driver: a controller in use stays with it, a free one is bound to
# vfio-pci and back, and its data is intact.
load crc32c_generic
load ext4
load vfio_iommu_type1
load vfio_pci
load uio_pci_generic
load loop
sleep 1
A=$(slot 8)
driver() { basename "$(readlink /sys/bus/pci/devices/$A/driver)"; }
refuses() { # refuses WORD COMMAND...: the command fails, its message has the word, and the driver stays
	word=$1; shift
	"$@" > /tmp/refusal 2>&1 && { cat /tmp/refusal; echo "was not refused"; return 1; }
	cat /tmp/refusal
	grep -q "$word" /tmp/refusal && [ "$(driver)" = nvme ]
}
status() {
	pumice setup status && pumice setup status --json > /tmp/status && grep -q "\"$A\"" /tmp/status
}
mounted() {
	mke2fs /dev/nvme0n1 > /dev/null && mkdir -p /mnt/fs && mount -t ext4 /dev/nvme0n1 /mnt/fs || return 1
	echo hello > /mnt/fs/file
	refuses "mounted at /mnt/fs" pumice setup bind $A && cat /mnt/fs/file && umount /mnt/fs
}
mounted_elsewhere() { # there is a mount that this process's table does not show
	unshare -m sh -c 'mount --make-rprivate /; mount -t ext4 /dev/nvme0n1 /mnt/fs && touch /tmp/there && sleep 6' &
	for n in 1 2 3 4 5 6 7 8 9; do [ -e /tmp/there ] || sleep 0.5; done
	[ -e /tmp/there ] || return 1
	refuses "mounted at /mnt/fs in the mount namespace" pumice setup bind $A; r=$?
	wait
	return $r
}
looped() { # a loop device does not claim the disk and is not a holder of it
	losetup /dev/loop0 /dev/nvme0n1 || return 1
	refuses "loop device loop0" pumice setup bind $A; r=$?
	losetup -d /dev/loop0
	return $r
}
no_such_user() { refuses "no user" pumice setup bind $A --user nosuch; }
swap() {
	mkswap /dev/nvme0n2 > /dev/null && swapon /dev/nvme0n2 || return 1
	refuses "swap space" pumice setup bind $A && swapoff /dev/nvme0n2
}
opened() {
	sleep 20 < /dev/nvme0n1 & p=$!
	sleep 0.5
	refuses "process $p" pumice setup bind $A; r=$?
	kill $p
	return $r
}
away_and_back() {
	pumice setup bind $A && [ "$(driver)" = vfio-pci ] && [ ! -e /dev/nvme0n1 ] || return 1
	pumice setup bind $A | grep already && pumice doctor $A && pumice setup unbind $A || return 1
	[ "$(driver)" = nvme ] || return 1
	sleep 1
	mount -t ext4 /dev/nvme0n1 /mnt/fs && grep hello /mnt/fs/file && umount /mnt/fs
}
uio_and_back() {
	pumice setup bind $A --driver uio && [ "$(driver)" = uio_pci_generic ] || return 1
	pumice doctor $A && return 1 # no huge pages
	pumice setup unbind $A && [ "$(driver)" = nvme ]
}
handed_over() {
	printf 'root:x:0:0::/root:/bin/sh\ndb:x:998:997::/:/bin/sh\n' > /etc/passwd
	pumice setup bind $A --user db || return 1
	node=/dev/vfio/$(basename "$(readlink /sys/bus/pci/devices/$A/iommu_group)")
	ls -ln $node | grep '998 *997'; r=$?
	pumice setup unbind $A && return $r
}
ordinary_user() { # without a memlock limit a user can drive the device; with one, the error names the limit
	pumice setup bind $A --user db || return 1
	chmod 1777 /tmp
	su db -c "pumice doctor $A && pumice-rig test verify nvme://$A/2" || return 1
	ulimit -l 1024
	su db -c "pumice doctor $A" | grep 'missing.*memlock' || return 1
	su db -c "pumice-rig test verify nvme://$A/2" > /tmp/limited && return 1
	cat /tmp/limited
	grep 'memlock limit is .*ulimit -l unlimited' /tmp/limited && pumice setup unbind $A
}
busy() { # a device that another process has is neither unbound nor waited for
	pumice setup bind $A || return 1
	node=/dev/vfio/$(basename "$(readlink /sys/bus/pci/devices/$A/iommu_group)")
	sleep 20 <> $node & p=$!
	sleep 0.5
	pumice setup unbind $A > /tmp/refusal 2>&1; r=$?
	cat /tmp/refusal
	pumice doctor $A | grep "process $p" || r=0
	kill $p; wait $p
	[ $r != 0 ] && grep -q "process $p" /tmp/refusal && pumice setup unbind $A && [ "$(driver)" = nvme ]
}
pages() { pumice setup huge-pages 8 && [ $(cat /proc/sys/vm/nr_hugepages) = 8 ] && pumice setup huge-pages 0; }
doctor() { # it says that the kernel has the controller, and prints the command that helps
	pumice doctor $A; [ $? = 1 ] && pumice doctor $A --json | grep "setup bind $A"
}
step "status names the controllers" status
step "a mounted file system stays" mounted
step "a mount of another namespace stays" mounted_elsewhere
step "a loop device's disk stays" looped
step "an unknown user is refused first" no_such_user
step "swap space stays" swap
step "an open device stays" opened
step "doctor before" doctor
step "to vfio-pci and back, data intact" away_and_back
step "to uio and back" uio_and_back
step "handed over to a user" handed_over
step "driven by an ordinary user" ordinary_user
step "not unbound while a process uses it" busy
step "huge pages on demand" pages
