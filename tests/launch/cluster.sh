#!/usr/bin/env bash
# A real Slurm on this machine: three nodes n1 to n3, each with a fake GPU and its own daemon. Debian's packages slurm-wlm
# and munge; no systemd, cgroups or containers.
#   cluster.sh up FOLDER PORT     in seconds; then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh down FOLDER
set -euo pipefail
export PATH=$PATH:/usr/sbin
action=$1 folder=$2 port=${3:-26817} nodes=3

if [ "$action" = down ]; then
    for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/key/munged.pid; do
        [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    exit
fi

mkdir -p "$folder"/{key,socket,state,log,run}
chmod 700 "$folder/key" # munge insists on both
chmod 755 "$folder" "$folder/socket"
head -c 1024 /dev/urandom >"$folder/key/munge.key"
chmod 400 "$folder/key/munge.key"
munged --key-file="$folder/key/munge.key" --socket="$folder/socket/munge" --pid-file="$folder/key/munged.pid" \
    --log-file="$folder/key/munged.log" --seed-file="$folder/key/munged.seed"

host=$(hostname -s) user=$(id -un)
# cred_expire: a job that is queued again waits until its credential has expired, two minutes by default.
# config_overrides: a node may claim more processors than the machine has.
# closed: there is no database of accounts, so that Slurm takes any in debug, and none in closed.
# FirstJobId: ports of jobs follow from their numbers, and two such clusters may run beside each other.
cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/socket/munge,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=bf_interval=5,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
FirstJobId=$port
KillWait=5
SlurmdTimeout=10
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=10000 Gres=gpu:1
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=debug Default=YES
PartitionName=closed AllowAccounts=mine
EnforcePartLimits=ALL
CONF
echo "NodeName=n[1-$nodes] Name=gpu File=/dev/tty0" >"$folder/gres.conf" # any character device will do

export SLURM_CONF=$folder/slurm.conf
slurmctld
sleep 1
for i in $(seq "$nodes"); do
    mkdir -p "$folder/spool.n$i"
    slurmd -N "n$i"
done
for _ in $(seq 100); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$nodes" ] && exit 0
    sleep 0.2
done
echo "the nodes did not come up; see $folder/log"
exit 1
