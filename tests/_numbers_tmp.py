import sys; sys.path.insert(0,"/work/main")
import warnings; warnings.simplefilter("ignore")
from tests.distributed import test_ddp, test_fsdp, models
from tests.distributed.ranks import Ranks
from tnadapt import Static
if __name__ == "__main__":
    for w in (2,4):
        r=Ranks(w)
        for name, mod in (("ddp",test_ddp),("fsdp2",test_fsdp)):
            for kind in ("adamw","foreach","fused","sgd"):
                res=r.run(mod._runtime, kind); one=models.on_one_process(res[0]["initial"],kind=kind)
                moved=max(float((res[0]["values"][n]-res[0]["initial"][n]).abs().max()) for n in res[0]["initial"])
                print(w,name,kind,"drift",models.drift(res),"difference",models.difference(res[0],one),"moved",round(moved,3),flush=True)
        r.close()
