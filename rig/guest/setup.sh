# The operator's tools on a controller that the kernel's driver has.
load ext4
sleep 1
step "status names the controller" sh -c "pumice setup status | grep $(slot 8)"
